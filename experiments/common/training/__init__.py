"""One training engine, for runs of a minute and of a week."""
