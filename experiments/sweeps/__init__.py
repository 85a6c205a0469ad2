"""Many runs: executed by workers, watched, searched, cleaned up after."""
