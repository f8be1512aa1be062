"""Start the server from a checkout: ``python run.py --help``."""

from sse_server.cli import main

if __name__ == "__main__":
    main()
