"""Short scripts to copy from; the test suite runs each."""
