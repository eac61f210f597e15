"""What can be seen from outside: metrics and logs. Reads gauges and Usage, decides nothing."""
