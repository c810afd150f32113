"""Code that goes into an exported folder, as it is: PyTorch and transformers only, no import of latentjax."""
