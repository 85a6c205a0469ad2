"""What is checked in a browser, where there is Chromium: ``make explorer-check`` and ``make site-check``."""
