"""A run's figures as text, as a page and as plots; everything is made from ``results.json``.

``summary`` collects the figures of every row with their differences, and ``rows`` the tables beside it. ``text`` prints
them to a terminal and as Markdown, and says in sentences what is certain; ``html`` fills the templates with them.
``plots`` draws with matplotlib, for files and for the page. Columns, titles, directions and phrases come from the
figures that a benchmark declares, and the marked answers of the page from ``Benchmark.marked``: no benchmark is known
by its name, and only the table of text quality knows what CHAIR keeps beside its figures.
"""
