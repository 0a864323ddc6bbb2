"""The law of scale: what DP-SGD adds to a public generator, by patients, epsilon and trainable parameters."""
