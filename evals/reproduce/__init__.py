"""``vlmfix reproduce``: published tables, the commands that give them, and expected beside measured."""
