"""Used by every part of the runner: files, errors, output, processes, plots."""
