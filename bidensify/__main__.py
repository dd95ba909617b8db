"""``python -m bidensify``, and ``accelerate launch -m bidensify`` for several processes."""

from __future__ import annotations

from bidensify.cli import main

if __name__ == "__main__":
    main()
