"""What every part of the runner uses: files, errors, output, processes, plots."""
