"""Networks for segmentation in real time, small: ENet, ERFNet, BiSeNetV2, STDC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from field_parts import cbr
from torch import Tensor, nn

__all__ = ["STDC", "BiSeNetV2", "ENet", "ERFNet"]


class ENetDown(nn.Module):
    """ENet's downsampling bottleneck: the main branch is pooled with indices and padded with zeros."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        inner = channels // 2
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.ext = nn.Sequential(
            nn.Conv2d(channels, inner, 2, 2, bias=False), nn.BatchNorm2d(inner), nn.PReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.PReLU(),
            nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out), nn.Dropout2d(0.01),
        )  # fmt: skip
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        main, indices = self.pool(x)
        ext = self.ext(x)
        padding = torch.zeros(x.shape[0], ext.shape[1] - main.shape[1], *main.shape[2:], device=x.device)
        return self.act(torch.cat((main, padding), 1) + ext), indices


class ENetBottleneck(nn.Module):
    """Regular, dilated or asymmetric, with dropout on the extension."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        inner = channels // 4
        middle: list[nn.Module] = [nn.Conv2d(inner, inner, 3, padding=1)]
        if kind == "dilated":
            middle = [nn.Conv2d(inner, inner, 3, padding=2, dilation=2)]
        elif kind == "asymmetric":
            middle = [nn.Conv2d(inner, inner, (5, 1), padding=(2, 0)), nn.Conv2d(inner, inner, (1, 5), padding=(0, 2))]
        self.reduce = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.PReLU())
        self.middle = nn.Sequential(*middle, nn.BatchNorm2d(inner), nn.PReLU())
        self.expand = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.drop = nn.Dropout2d(0.1)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.drop(self.expand(self.middle(self.reduce(x)))))


class ENetUp(nn.Module):
    """Unpooling with the encoder's indices beside a transposed convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
        self.unpool = nn.MaxUnpool2d(2)
        self.reduce = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.deconv = nn.ConvTranspose2d(out, out, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return F.relu(self.unpool(self.main(x), indices) + self.norm(self.deconv(self.reduce(x))))


class ENet(nn.Module):
    """Paszke et al. 2016."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 13, 3, 2, 1, bias=False)
        self.down1, self.down2 = ENetDown(16, 32), ENetDown(32, 64)
        self.stage1 = nn.Sequential(ENetBottleneck(32, "regular"), ENetBottleneck(32, "regular"))
        self.stage2 = nn.Sequential(*(ENetBottleneck(64, kind) for kind in ("regular", "dilated", "asymmetric")))
        self.up1, self.up2 = ENetUp(64, 32), ENetUp(32, 16)
        self.full = nn.ConvTranspose2d(16, 5, 2, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.cat((self.first(image), F.max_pool2d(image, 2)), 1)
        x, indices1 = self.down1(x)
        x, indices2 = self.down2(self.stage1(x))
        return self.full(self.up2(self.up1(self.stage2(x), indices2), indices1))


class NonBottleneck1D(nn.Module):
    """ERFNet's factorised residual: 3×1, 1×3, 3×1, 1×3 dilated."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv3x1_1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.conv3x1_2 = nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1))
        self.conv1x3_2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation))
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv3x1_1(x))
        y = F.relu(self.bn1(self.conv1x3_1(y)))
        y = F.relu(self.conv3x1_2(y))
        y = self.bn2(self.conv1x3_2(y))
        return F.relu(y + x)


class ERFDown(nn.Module):
    """A strided convolution and a pooling, concatenated."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(channels, out - channels, 3, 2, 1), nn.MaxPool2d(2, 2)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(torch.cat([self.conv(x), self.pool(x)], 1)))


class ERFNet(nn.Module):
    """Romera et al. 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = ERFDown(3, 16)
        self.layers = nn.ModuleList(
            [ERFDown(16, 32), NonBottleneck1D(32, 1), ERFDown(32, 64), NonBottleneck1D(64, 2), NonBottleneck1D(64, 4)]
        )
        self.up = nn.ConvTranspose2d(64, 16, 3, 2, 1, output_padding=1)
        self.up_bn = nn.BatchNorm2d(16, eps=1e-3)
        self.refine = NonBottleneck1D(16, 1)
        self.output = nn.ConvTranspose2d(16, 5, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.refine(F.relu(self.up_bn(self.up(x)))))


class GatherExpansion(nn.Module):
    """BiSeNetV2's layer: convolution, depthwise expansion, projection, and a shortcut that strides."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        wide = channels * 2
        self.conv1 = cbr(channels, channels)
        self.dwconv = cbr(channels, wide, 3, stride, act=False, groups=channels)
        self.conv2 = cbr(wide, out, 1, act=False)
        self.shortcut: nn.Module | None = None
        if stride > 1:
            self.shortcut = nn.Sequential(
                *cbr(channels, channels, 3, stride, act=False, groups=channels), *cbr(channels, out, 1, act=False)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        feat = self.conv2(self.dwconv(self.conv1(x)))
        return self.relu(feat + (x if self.shortcut is None else self.shortcut(x)))


class BilateralGuided(nn.Module):
    """Detail and semantics gate each other through sigmoids at two resolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.detail_keep = nn.Sequential(*cbr(channels, channels, act=False), nn.Conv2d(channels, channels, 1))
        self.detail_down = nn.Sequential(*cbr(channels, channels, 3, 2, act=False), nn.AvgPool2d(3, 2, 1))
        self.semantic_up = cbr(channels, channels, act=False)
        self.semantic_keep = nn.Sequential(*cbr(channels, channels, act=False), nn.Conv2d(channels, channels, 1))
        self.conv = cbr(channels, channels, act=False)

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        size = detail.shape[2:]
        left = self.detail_keep(detail) * torch.sigmoid(F.interpolate(self.semantic_up(semantic), size=size))
        right = self.detail_down(detail) * torch.sigmoid(self.semantic_keep(semantic))
        return self.conv(left + F.interpolate(right, size=size))


class BiSeNetV2(nn.Module):
    """Yu et al. 2021; the auxiliary head runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.detail = nn.Sequential(cbr(3, 16, 3, 2), cbr(16, 16), cbr(16, 32, 3, 2), cbr(32, 32))
        self.stem, self.left = cbr(3, 8, 3, 2), nn.Sequential(cbr(8, 4, 1), cbr(4, 8, 3, 2))
        self.right, self.fuse = nn.MaxPool2d(3, 2, 1), cbr(16, 8)
        self.semantic = nn.Sequential(
            GatherExpansion(8, 16, 2),
            GatherExpansion(16, 16, 1),
            GatherExpansion(16, 32, 2),
            GatherExpansion(32, 32, 1),
        )
        self.bga = BilateralGuided(32)
        self.head = nn.Sequential(cbr(32, 32), nn.Dropout(0.1), nn.Conv2d(32, 5, 1))
        self.aux = nn.Sequential(cbr(16, 16), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        detail = self.detail(x)
        s = self.stem(x)
        s = self.fuse(torch.cat((self.left(s), self.right(s)), dim=1))
        middle = self.semantic[:2](s)
        out = self.head(self.bga(detail, self.semantic[2:](middle)))
        out = F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return (out, self.aux(middle)) if self.training else out


class STDCModule(nn.Module):
    """Short-term dense concatenation: each convolution halves the width, all are concatenated."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList([cbr(channels, out // 2, 1), cbr(out // 2, out // 4), cbr(out // 4, out // 4)])
        self.stride = stride
        if stride == 2:
            self.avd_layer = cbr(out // 2, out // 2, 3, 2, act=False, groups=out // 2)
            self.skip = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        first = self.conv_list[0](x)
        for index, conv in enumerate(self.conv_list[1:]):
            if index == 0:
                out = conv(self.avd_layer(first) if self.stride == 2 else first)
            else:
                out = conv(out)
            found.append(out)
        if self.stride == 2:
            first = self.skip(first)
        return torch.cat([first, *found], dim=1)


class STDC(nn.Module):
    """Fan et al. 2021: attention refinement (a gate of a pooled map) and feature fusion on the STDC backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(cbr(3, 8, 3, 2), cbr(8, 16, 3, 2))
        self.stage3 = nn.Sequential(STDCModule(16, 32, 2), STDCModule(32, 32, 1))
        self.stage4 = nn.Sequential(STDCModule(32, 64, 2), STDCModule(64, 64, 1))
        self.arm, self.arm_atten, self.arm_norm = cbr(64, 16), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.average = cbr(64, 16, 1)
        self.conv_head = cbr(16, 16)
        self.ffm, self.ffm1, self.ffm2 = cbr(48, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.out = nn.Sequential(cbr(16, 16), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        feat8 = self.stage3(self.stem(x))
        feat16 = self.stage4(feat8)
        average = F.interpolate(self.average(F.avg_pool2d(feat16, feat16.shape[2:])), feat16.shape[2:], mode="nearest")
        arm = self.arm(feat16)
        arm = torch.mul(arm, torch.sigmoid(self.arm_norm(self.arm_atten(F.avg_pool2d(arm, arm.shape[2:])))))
        up = self.conv_head(F.interpolate(arm + average, feat8.shape[2:], mode="nearest"))
        fused = self.ffm(torch.cat([feat8, up], dim=1))
        atten = F.avg_pool2d(fused, fused.shape[2:])
        atten = self.ffm2(F.relu(self.ffm1(atten))).sigmoid()
        fused = torch.mul(fused, atten) + fused
        return F.interpolate(self.out(fused), x.shape[2:], mode="bilinear")
