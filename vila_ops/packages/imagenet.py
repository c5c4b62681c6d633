"""Mean and deviation of the channels of ImageNet's images, by which many towers want their pixels normalised."""

Channels = tuple[float, float, float]
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
