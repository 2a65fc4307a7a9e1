"""``vlmfix compare``: paired differences between the methods of several runs."""
