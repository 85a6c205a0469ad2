"""The site: docs/ and the library's docstrings as pages that open from a folder (``python -m docs.site``)."""
