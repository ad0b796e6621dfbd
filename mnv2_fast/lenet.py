"""LeNet-5, for colour photos."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .weights import Preprocessing

SIZE = 32
PREPROCESSING = Preprocessing(resize=36, crop=SIZE)  # about the share that 224 is of 256


class ScaledTanh(nn.Module):
    """1.7159 tanh(2/3 x): 1 at 1 and -1 at -1 (LeCun et al. 1998, appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 1.7159 * torch.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    """The paper's pooling: the sum of 2 x 2 pixels, times a coefficient, plus a bias, both of the channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H // 2, W // 2]."""
        total = 4 * nn.functional.avg_pool2d(x, 2)
        return total * self.weight[:, None, None] + self.bias[:, None, None]


class LeNet5(nn.Module):
    """LeNet-5 for colour input.

    LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings
    of the IEEE 86(11), 1998, section II.B.

    C1 (6 maps, 5 x 5), S2, C3 (16 maps, 5 x 5), S4, C5 (120 maps, 5 x 5), F6 (84), output; S2 and S4 are
    `Subsampling`, and `ScaledTanh` follows each layer but the output. 61,625 parameters for five classes.

    What differs from the paper, and why:

    - C1 sees three channels instead of one: photos have colour, and flowers differ in it.
    - C3 sees all maps of S2. The paper's table of connections saved time and kept maps from becoming alike;
      the one is small today, and random weights do the other.
    - The output is linear, for `nn.CrossEntropyLoss`. The paper's is the distance to drawings of the
      characters, which other classes do not have, and its loss was made for that.
    - Pixels are normalized by the mean and standard deviation of `PREPROCESSING` and not from -0.1 to 1.175:
      for the same mean of about 0 and variance of about 1, in photos.
    - First weights have a standard deviation of 1 / sqrt(inputs), as "Efficient BackProp" of the same year
      says, and not within 2.4 / inputs, with which signals fade in layers of hundreds of inputs. Subsampling
      begins as the mean, and biases as 0.

    Args:
        num_classes: outputs.
        in_channels: of the images.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5),
            ScaledTanh(),
            Subsampling(6),
            ScaledTanh(),
            nn.Conv2d(6, 16, 5),
            ScaledTanh(),
            Subsampling(16),
            ScaledTanh(),
            nn.Conv2d(16, 120, 5),
            ScaledTanh(),
        )
        self.classifier = nn.Sequential(nn.Linear(120, 84), ScaledTanh(), nn.Linear(84, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New first weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, Subsampling):
                nn.init.constant_(module.weight, 1 / 4)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits.

        Args:
            x: [N, in_channels, 32, 32].

        Returns:
            [N, num_classes].

        Raises:
            ValueError: the images are of another size.
        """
        if x.shape[2:] != (SIZE, SIZE):
            raise ValueError(f"LeNet-5 takes [N, C, {SIZE}, {SIZE}], not {list(x.shape)}: resize the images")
        return self.classifier(self.features(x).flatten(1))
