"""Networks for depth, flow and restoration, small: FastDepth, Monodepth2, PWC-Net, EDSR, RCAN, DnCNN, a Laplacian pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from field_parts import Basic, cbr
from torch import Tensor, nn

__all__ = ["EDSR", "RCAN", "DnCNN", "FastDepth", "LaplacianPyramid", "Monodepth2", "PWCNet"]


class FastDepth(nn.Module):
    """Wofk et al. 2019: a MobileNet, NNConv5 with additive skips."""

    def __init__(self) -> None:
        super().__init__()

        def depthwise(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(*cbr(channels, channels, kernel, stride, groups=channels), *cbr(channels, out, 1))

        self.conv0, self.conv1 = cbr(3, 16, 3, 2), depthwise(16, 16)
        self.conv2, self.conv3 = depthwise(16, 32, 3, 2), depthwise(32, 64, 3, 2)
        self.decode_conv1, self.decode_conv2 = depthwise(64, 32, 5), depthwise(32, 16, 5)
        self.decode_conv3, self.decode_conv4 = depthwise(16, 8, 5), cbr(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = getattr(self, f"conv{i}")(x)
            if i == 1:
                x1 = x
            elif i == 2:
                x2 = x
        for i in range(1, 5):
            x = getattr(self, f"decode_conv{i}")(x)
            if i < 4:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            if i == 1:
                x = x + x2
            elif i == 2:
                x = x + x1
        return x


class Monodepth2(nn.Module):
    """Godard et al. 2019: reflection padding, ELU, a dictionary of layers by tuples, disparities at several scales."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([cbr(3, 8, 3, 2), Basic(8, 16, 2), Basic(16, 32, 2)])
        widths, skips = [8, 8, 16], [8, 16, 32]
        self.convs: dict[tuple[str, int] | tuple[str, int, int], nn.Module] = {}
        for i in range(2, -1, -1):
            self.convs[("upconv", i, 0)] = self.block(32 if i == 2 else widths[i + 1], widths[i])
            self.convs[("upconv", i, 1)] = self.block(widths[i] + (skips[i - 1] if i > 0 else 0), widths[i])
            self.convs[("dispconv", i)] = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(widths[i], 1, 3))
        self.decoder = nn.ModuleList(list(self.convs.values()))
        self.sigmoid = nn.Sigmoid()

    @staticmethod
    def block(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(channels, out, 3), nn.ELU(inplace=True))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features: list[Tensor] = []
        x = (image - 0.45) / 0.225
        for stage in self.encoder:
            features.append(stage(features[-1] if features else x))
        outputs = {}
        x = features[-1]
        for i in range(2, -1, -1):
            x = self.convs[("upconv", i, 0)](x)
            found = [F.interpolate(x, scale_factor=2, mode="nearest")]
            if i > 0:
                found += [features[i - 1]]
            x = self.convs[("upconv", i, 1)](torch.cat(found, 1))
            outputs[f"disp{i}"] = self.sigmoid(self.convs[("dispconv", i)](x))
        return outputs


class PWCNet(nn.Module):
    """Sun et al. 2018: a pyramid for both images, cost volumes, warping by the flow so far, dense decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList([self.conv(3, 8, 2), self.conv(8, 16, 2), self.conv(16, 24, 2)])
        self.decoders = nn.ModuleDict()
        self.predict = nn.ModuleDict()
        self.deconv = nn.ModuleDict()
        for level, width in ((2, 24), (1, 16)):
            start = 25 + (0 if level == 2 else width + 2)
            self.decoders[str(level)] = nn.ModuleList([self.conv(start, 16), self.conv(start + 16, 8)])
            self.predict[str(level)] = nn.Conv2d(start + 24, 2, 3, padding=1)
            self.deconv[str(level)] = nn.ConvTranspose2d(2, 2, 4, 2, 1)
        self.context = nn.Sequential(self.conv(start + 24, 16), nn.Conv2d(16, 2, 3, padding=2, dilation=2))

    @staticmethod
    def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.LeakyReLU(0.1))

    @staticmethod
    def cost_volume(a: Tensor, b: Tensor, reach: int = 2) -> Tensor:
        _, _, height, width = a.shape
        padded = F.pad(b, [reach] * 4)
        costs = [
            (a * padded[:, :, i : i + height, j : j + width]).mean(dim=1, keepdim=True)
            for i in range(2 * reach + 1)
            for j in range(2 * reach + 1)
        ]
        return torch.cat(costs, dim=1)

    @staticmethod
    def warp(x: Tensor, flow: Tensor) -> Tensor:
        _, _, height, width = x.shape
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((xs, ys)).float().to(x.device)[None] + flow
        grid = torch.stack((2 * grid[:, 0] / max(width - 1, 1) - 1, 2 * grid[:, 1] / max(height - 1, 1) - 1), dim=3)
        return F.grid_sample(x, grid, align_corners=True)

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        pyramids = []
        for image in (first, second):
            levels = []
            for stage in self.pyramid:
                image = stage(image)
                levels.append(image)
            pyramids.append(levels)
        flows: list[Tensor] = []
        up: Tensor | None = None
        for level in (2, 1):
            a, b = pyramids[0][level], pyramids[1][level]
            if up is None:
                x = F.leaky_relu(self.cost_volume(a, b), 0.1)
            else:
                x = torch.cat((F.leaky_relu(self.cost_volume(a, self.warp(b, up)), 0.1), a, up), 1)
            for layer in self.decoders[str(level)]:
                x = torch.cat((layer(x), x), 1)
            flows.append(self.predict[str(level)](x))
            up = self.deconv[str(level)](flows[-1])
        flows[-1] = flows[-1] + self.context(x)
        return flows[::-1]


class EDSR(nn.Module):
    """Lim et al. 2017: residual blocks without norms, scaled by 0.1, a long skip, pixel shuffle; the means as convolutions."""

    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        body: list[nn.Module] = [ScaledBlock(width, 0.1) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        res = self.body(x)
        res += x
        return self.add_mean(self.tail(res))


class ScaledBlock(nn.Module):
    """EDSR's block."""

    def __init__(self, width: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)
        )
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        res = self.body(x).mul(self.res_scale)
        res += x
        return res


class RCAN(nn.Module):
    """Zhang et al. 2018: channel attention in residual blocks in residual groups in a long skip."""

    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
            self.conv_du = nn.Sequential(
                nn.Conv2d(width, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, width, 1), nn.Sigmoid()
            )

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv_du(self.avg_pool(x))

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1),
                RCAN.Attention(width),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            res = self.body(x)
            res += x
            return res

    class Group(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(RCAN.Block(width), RCAN.Block(width), nn.Conv2d(width, width, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            res = self.body(x)
            res += x
            return res

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(RCAN.Group(width), RCAN.Group(width), nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        res = self.body(x)
        res += x
        return self.tail(res)


class DnCNN(nn.Module):
    """Zhang et al. 2017: one chain that predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=0.95), nn.ReLU(True)]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, y: Tensor) -> Tensor:
        return y - self.dncnn(y)


class LaplacianPyramid(nn.Module):
    """LapSRN's and kin: three levels of an image's pyramid, shared blocks, a mask refined from level to level."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.2), *[Wide(16) for _ in range(2)])
        self.to_image = nn.Conv2d(16, 3, 3, padding=1)
        self.mask = nn.Sequential(nn.Conv2d(9, 16, 1), Wide(16), nn.Conv2d(16, 3, 1))
        self.refine = nn.Sequential(nn.Conv2d(3, 16, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 3, 1))

    def forward(self, image: Tensor) -> Tensor:
        levels, current = [], image
        for _ in range(2):
            smaller = F.avg_pool2d(current, 2)
            levels.append(current - F.interpolate(smaller, scale_factor=2, mode="bilinear"))
            current = smaller
        out = self.to_image(self.low(current)) + current
        up = F.interpolate(out, scale_factor=2, mode="bilinear")
        mask = self.mask(torch.cat([levels[1], F.interpolate(current, scale_factor=2, mode="bilinear"), up], 1))
        out = levels[1] * mask + up
        mask = self.refine(F.interpolate(mask, scale_factor=2, mode="bilinear"))
        return levels[0] * mask + F.interpolate(out, scale_factor=2, mode="bilinear")


class Wide(nn.Module):
    """A residual block without norms, LeakyReLU inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)
