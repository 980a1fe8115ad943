"""To and from other projects: their weights in ours, ours in theirs."""
