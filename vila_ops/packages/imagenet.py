"""ImageNet's mean and standard deviation per channel, of pixels in [0, 1], with which many towers normalise."""

Channels = tuple[float, float, float]
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
