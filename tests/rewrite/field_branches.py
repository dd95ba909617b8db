"""Networks of several branches and U-shapes, small: DDRNet, PIDNet, HRNet-OCR's head, Attention U-Net, U²-Net, TransUNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from field_parts import Basic, cbr
from torch import Tensor, nn

__all__ = ["AttentionUNet", "DDRNet", "ObjectContext", "PIDNet", "TransUNet", "U2Net"]


class PyramidPooling(nn.Module):
    """DAPPM: pooled at several scales, each added to the one before, pre-activation throughout."""

    def __init__(self, channels: int, inner: int, out: int) -> None:
        super().__init__()

        def pre(channels: int, out: int, kernel: int = 1) -> list[nn.Module]:
            return [
                nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
                nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False),
            ]  # fmt: skip

        self.scale0 = nn.Sequential(*pre(channels, inner))
        self.scale1 = nn.Sequential(nn.AvgPool2d(5, 2, 2), *pre(channels, inner))
        self.scale2 = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), *pre(channels, inner))
        self.process1, self.process2 = nn.Sequential(*pre(inner, inner, 3)), nn.Sequential(*pre(inner, inner, 3))
        self.compression, self.shortcut = nn.Sequential(*pre(3 * inner, out)), nn.Sequential(*pre(channels, out))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[-1]
        found = [self.scale0(x)]
        for scale, process in ((self.scale1, self.process1), (self.scale2, self.process2)):
            found.append(process(F.interpolate(scale(x), size=[height, width], mode="bilinear") + found[-1]))
        return self.compression(torch.cat(found, 1)) + self.shortcut(x)


class DDRNet(nn.Module):
    """Pan et al. 2022: two resolutions that exchange, one ReLU module for the whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(cbr(3, 16, 3, 2), cbr(16, 16, 3, 2))
        self.relu = nn.ReLU(inplace=False)
        self.layer1 = nn.Sequential(Basic(16, 16), Basic(16, 16, no_relu=True))
        self.layer3, self.layer3_ = Basic(16, 32, 2, no_relu=True), Basic(16, 16, no_relu=True)
        self.compression3, self.down3 = cbr(32, 16, 1, act=False), cbr(16, 32, 3, 2, act=False)
        self.layer4, self.layer4_ = Basic(32, 64, 2, no_relu=True), Basic(16, 16, no_relu=True)
        self.compression4 = cbr(64, 16, 1, act=False)
        self.down4 = nn.Sequential(cbr(16, 32, 3, 2), cbr(32, 64, 3, 2, act=False))
        self.spp = PyramidPooling(64, 16, 16)
        self.final = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.predict = nn.Conv2d(16, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.layer1(self.conv1(image))
        size = x.shape[-2:]
        low = self.layer3(self.relu(x))
        high = self.layer3_(self.relu(x))
        x = low + self.down3(self.relu(high))
        high = high + F.interpolate(self.compression3(self.relu(low)), size=size, mode="bilinear")
        low = self.layer4(self.relu(x))
        x_ = self.layer4_(self.relu(high))
        x = low + self.down4(self.relu(x_))
        x_ = x_ + F.interpolate(self.compression4(self.relu(low)), size=size, mode="bilinear")
        y = F.interpolate(self.spp(self.relu(x)), size=size, mode="bilinear")
        return self.predict(F.relu(self.final(self.relu(x_ + y))))


class ObjectContext(nn.Module):
    """HRNet-OCR's head: soft object regions gather the features, and pixels attend to them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(cbr(3, 16, 3, 2), Basic(16, 16), Basic(16, 32, 2))
        self.aux_head = nn.Sequential(cbr(32, 32, 1), nn.Conv2d(32, 5, 1))
        self.conv3x3 = cbr(32, 16)
        self.f_pixel, self.f_object = nn.Sequential(cbr(16, 8, 1), cbr(8, 8, 1)), nn.Sequential(cbr(16, 8, 1))
        self.f_down, self.f_up = cbr(16, 8, 1), cbr(8, 16, 1)
        self.bottleneck = nn.Sequential(cbr(32, 16, 1), nn.Dropout2d(0.05))
        self.cls_head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        feats = self.backbone(x)
        aux = self.aux_head(feats)
        feats = self.conv3x3(feats)
        n, c, h, w = feats.shape
        probs = F.softmax(aux.view(n, aux.size(1), -1), dim=2)
        context = torch.matmul(probs, feats.view(n, c, -1).permute(0, 2, 1)).permute(0, 2, 1).unsqueeze(3)
        query = self.f_pixel(feats).view(n, 8, -1).permute(0, 2, 1)
        key = self.f_object(context).view(n, 8, -1)
        value = self.f_down(context).view(n, 8, -1).permute(0, 2, 1)
        weights = F.softmax(torch.matmul(query, key) * 8**-0.5, dim=-1)
        found = torch.matmul(weights, value).permute(0, 2, 1).contiguous().view(n, 8, h, w)
        return [aux, self.cls_head(self.bottleneck(torch.cat([self.f_up(found), feats], 1)))]


class PIDNet(nn.Module):
    """Xu et al. 2023: Pag (one branch is mixed into another by similarity) and a boundary gate at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(cbr(3, 16, 3, 2), cbr(16, 16, 3, 2))
        self.layer_i, self.layer_p, self.layer_d = Basic(16, 32, 2), Basic(16, 16, no_relu=True), Basic(16, 16)
        self.compression = cbr(32, 16, 1, act=False)
        self.f_x, self.f_y = cbr(16, 8, 1, act=False), cbr(16, 8, 1, act=False)
        self.diff = cbr(32, 16, 3, act=False)
        self.conv_p, self.conv_i = cbr(16, 16, 1, act=False), cbr(16, 16, 1, act=False)
        self.final = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False))
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        size = x.shape[2:]
        i = self.layer_i(x)
        p, d = self.layer_p(x), self.layer_d(x)
        y = F.interpolate(self.compression(i), size, mode="bilinear", align_corners=False)
        y_q = self.f_y(y)
        similarity = torch.sigmoid(torch.sum(self.f_x(p) * y_q, dim=1).unsqueeze(1))
        p = (1 - similarity) * p + similarity * y
        d = d + F.interpolate(self.diff(i), size, mode="bilinear", align_corners=False)
        edge = torch.sigmoid(d)
        i = y
        p_add = self.conv_p((1 - edge) * i + p)
        i_add = self.conv_i(i + edge * p)
        return self.out(F.relu(self.final(p_add + i_add)))


class AttentionUNet(nn.Module):
    """Oktay et al. 2018: the skip is gated by what comes from below."""

    class Gate(nn.Module):
        def __init__(self, g: int, x: int, inner: int) -> None:
            super().__init__()
            self.W_g = nn.Sequential(nn.Conv2d(g, inner, 1), nn.BatchNorm2d(inner))
            self.W_x = nn.Sequential(nn.Conv2d(x, inner, 1), nn.BatchNorm2d(inner))
            self.psi = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
            self.relu = nn.ReLU(inplace=True)

        def forward(self, g: Tensor, x: Tensor) -> Tensor:
            return x * self.psi(self.relu(self.W_g(g) + self.W_x(x)))

    def __init__(self) -> None:
        super().__init__()
        self.Maxpool = nn.MaxPool2d(2, 2)
        self.Conv1, self.Conv2, self.Conv3 = self.pair(3, 8), self.pair(8, 16), self.pair(16, 32)
        self.Up3 = nn.Sequential(nn.Upsample(scale_factor=2), *cbr(32, 16))
        self.Up2 = nn.Sequential(nn.Upsample(scale_factor=2), *cbr(16, 8))
        self.Att3, self.Att2 = AttentionUNet.Gate(16, 16, 8), AttentionUNet.Gate(8, 8, 4)
        self.Up_conv3, self.Up_conv2 = self.pair(32, 16), self.pair(16, 8)
        self.Conv_1x1 = nn.Conv2d(8, 4, 1)

    @staticmethod
    def pair(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(*cbr(channels, out), *cbr(out, out))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.Conv1(x)
        x2 = self.Conv2(self.Maxpool(x1))
        d3 = self.Up3(self.Conv3(self.Maxpool(x2)))
        d3 = self.Up_conv3(torch.cat((self.Att3(g=d3, x=x2), d3), dim=1))
        d2 = self.Up2(d3)
        return self.Conv_1x1(self.Up_conv2(torch.cat((self.Att2(g=d2, x=x1), d2), dim=1)))


class U2Net(nn.Module):
    """Qin et al. 2020, one level deep: residual U-blocks, side outputs, a fused one."""

    class RSU(nn.Module):
        def __init__(self, channels: int, inner: int, out: int) -> None:
            super().__init__()
            self.rebnconvin = cbr(channels, out)
            self.rebnconv1, self.rebnconv2, self.rebnconv3 = cbr(out, inner), cbr(inner, inner), cbr(inner, inner)
            self.rebnconv2d, self.rebnconv1d = cbr(2 * inner, inner), cbr(2 * inner, out)
            self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)

        def forward(self, x: Tensor) -> Tensor:
            hxin = self.rebnconvin(x)
            hx1 = self.rebnconv1(hxin)
            hx2 = self.rebnconv2(self.pool(hx1))
            hx3 = self.rebnconv3(hx2)
            hx2d = self.rebnconv2d(torch.cat((hx3, hx2), 1))
            hx2d = F.interpolate(hx2d, size=hx1.shape[2:], mode="bilinear", align_corners=False)
            return self.rebnconv1d(torch.cat((hx2d, hx1), 1)) + hxin

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage1d = U2Net.RSU(3, 8, 16), U2Net.RSU(16, 8, 16), U2Net.RSU(32, 8, 16)
        self.pool12 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.side1, self.side2 = nn.Conv2d(16, 1, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.outconv = nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hx1 = self.stage1(x)
        hx2 = self.stage2(self.pool12(hx1))
        hx1d = self.stage1d(torch.cat((F.interpolate(hx2, size=hx1.shape[2:], mode="bilinear"), hx1), 1))
        d1 = self.side1(hx1d)
        d2 = F.interpolate(self.side2(hx2), size=d1.shape[2:], mode="bilinear")
        d0 = self.outconv(torch.cat((d1, d2), 1))
        return torch.sigmoid(d0), torch.sigmoid(d1), torch.sigmoid(d2)


class TransUNet(nn.Module):
    """Chen et al. 2021: convolutional features, a transformer on their tokens, a decoder with skips."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
            self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            h = x
            x = self.attention_norm(x)
            x = h + self.attn(x, x, x, need_weights=False)[0]
            return x + self.fc2(F.gelu(self.fc1(self.ffn_norm(x))))

    def __init__(self) -> None:
        super().__init__()
        self.root, self.block1, self.block2 = cbr(3, 8, 3, 2), Basic(8, 16, 2), Basic(16, 32, 2)
        self.patch_embeddings = nn.Conv2d(32, 16, 1)
        self.encoder, self.encoder_norm = TransUNet.Layer(16), nn.LayerNorm(16)
        self.conv_more = cbr(16, 32)
        self.up1, self.up2 = nn.Sequential(cbr(48, 16), cbr(16, 16)), nn.Sequential(cbr(24, 8), cbr(8, 8))
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        a = self.root(x)
        b = self.block1(a)
        tokens = self.patch_embeddings(self.block2(b))
        n, c, h, w = tokens.shape
        tokens = self.encoder_norm(self.encoder(tokens.flatten(2).transpose(-1, -2)))
        x = self.conv_more(tokens.permute(0, 2, 1).contiguous().view(n, c, h, w))
        for up, skip in ((self.up1, b), (self.up2, a)):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0, mode="bilinear"), skip], dim=1))
        return self.segmentation_head(x)
