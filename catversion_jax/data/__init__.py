"""From a folder of photos to latents on the device: photos -> dataset (TFDS, ArrayRecord) -> posteriors."""
