"""``vlmfix tune``: search a method's parameters on calibration images, confirm the choice on others."""
