"""Channel mixers: functions of each token by itself."""
