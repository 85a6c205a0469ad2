"""The folder of a run: what lies in it, who is at work in it, how recorded runs are found."""
