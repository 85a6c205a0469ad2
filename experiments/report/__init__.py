"""What recorded runs show, as a page with tables and plots."""
