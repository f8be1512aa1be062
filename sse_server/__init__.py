"""A notification push service: rows in PostgreSQL become Server-Sent Events in the browser."""

__version__ = "0.1.0"
