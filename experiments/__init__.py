"""The experiment runner: tasks, training, records and reports, built on seqarch; the command `seqarch`, from a wheel or a checkout."""
