"""``python -m wsfed`` is ``wsfed``."""

from wsfed.cli import main

if __name__ == "__main__":
    main()
