"""`python -m kdcache`, the same as the installed command."""

from kdcache.cli.main import main

main()
