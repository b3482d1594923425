"""The private step of a discriminator, with two engines behind one function. Only client/train imports this."""

from client.dp.packing import Batch as Batch
from client.dp.step import Noise as Noise
from client.dp.step import PrivateOptimizer as PrivateOptimizer
from client.dp.step import private_gradient as private_gradient
from client.dp.step import private_optimizer as private_optimizer
from client.dp.step import private_step as private_step
