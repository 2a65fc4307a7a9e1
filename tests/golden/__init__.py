"""What every verb of the command line gave before, and how to compare with it."""
