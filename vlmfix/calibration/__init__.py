"""Learns from a few samples what some methods need to know about a model: ``vlmfix.calibrate``.

One file per method. Its ``search(session, samples, method, *, option=default, ...)`` asks the stock model through a
``Session`` and returns what it ``Found``: the method with the learned parameters, and the counts and scores behind it.
``LEARNED`` names these parameters. ``calibrate`` checks the options, opens the session and writes down where everything
came from.

To add one: write ``calibration/NAME.py`` with ``LEARNED`` and ``search``, add the module to ``calibrate.SEARCHES``,
and hold it against a plain computation in ``tests/plugin/calibration``. The keyword-only parameters of ``search`` are
the options of ``vlmfix.calibrate(model, NAME, data, option=...)`` and of ``vlmfix calibrate NAME --set option=...``.
"""
