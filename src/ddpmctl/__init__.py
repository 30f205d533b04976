"""ddpmctl: a folder of images in, a trained denoising diffusion model and new images out."""

__version__ = "0.1.0"
