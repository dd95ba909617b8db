"""Step 1 of a rewrite: run the network once and write down what it did."""
