"""The private step of a discriminator, or a site's share of one, with two engines behind one function.

Only client/train, client/gradient and client/draw import this.
"""

from client.dp.packing import Batch as Batch
from client.dp.share import integer_share as integer_share
from client.dp.step import Noise as Noise
from client.dp.step import PrivateOptimizer as PrivateOptimizer
from client.dp.step import make_adder as make_adder
from client.dp.step import private_gradient as private_gradient
from client.dp.step import private_optimizer as private_optimizer
from client.dp.step import private_step as private_step
