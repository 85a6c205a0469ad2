"""What is checked in a browser: ``make site-check``, where there is Chromium."""
