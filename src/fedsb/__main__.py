"""`python -m fedsb` is `fedsb`."""

from fedsb.cli.app import main

main()
