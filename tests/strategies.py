"""What the property tests draw from."""

from gradless import kernels, noise
from gradless.noise import Gaussian, Rademacher, RoundedGaussian, Stream

INTEGER_DISTRIBUTIONS = [
    noise.uniform_grid(1),
    noise.uniform_grid(7),
    noise.discretized_gaussian(3, 0.7),
    noise.rounded_gaussian(0.02),
    noise.rounded_gaussian(0.25),  # its largest step is too rare to be drawn
    noise.rounded_gaussian(1.3),
    RoundedGaussian(0.4),
    RoundedGaussian(2.5, Stream.SECOND),
]
DISTRIBUTIONS = [Gaussian(), Rademacher(), *INTEGER_DISTRIBUTIONS]
EVERY_TYPE = kernels.EVERY_TYPE
