"""``vlmfix score``: scores what somebody else generated, from files alone."""
