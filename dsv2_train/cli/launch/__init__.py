"""What launch/local.sh runs: check everything, then start the ranks of one node."""
