"""The service and its peers, side by side: ``make bench``. See README.md in this directory."""
