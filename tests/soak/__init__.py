"""Hours of coming and going: ``make soak``."""
