"""`python -m fedsb` is `fedsb`."""

from fedsb.cli import main

main()
