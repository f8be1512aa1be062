"""``python -m sse_server``."""

from sse_server.cli import main

if __name__ == "__main__":
    main()
