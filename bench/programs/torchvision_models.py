"""Models of torchvision, made small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.program import CALLS, Training, program


def _classify(model: nn.Module, side: int = 32) -> Training:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(image: Tensor, target: Tensor) -> Tensor:
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.rand(4, 3, side, side), torch.randint(5, (4,))) for _ in range(CALLS)])


@program("torchvision_models", "torchvision")
def torchvision_resnet() -> Training:
    from torchvision.models.resnet import BasicBlock, ResNet

    return _classify(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))


@program("torchvision_models", "torchvision")
def torchvision_vit() -> Training:
    from torchvision.models import VisionTransformer

    return _classify(VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=5))


@program("torchvision_models", "torchvision")
def torchvision_mobilenet() -> Training:
    from torchvision.models import MobileNetV2

    settings = [[1, 8, 1, 1], [2, 16, 1, 2]]
    return _classify(
        MobileNetV2(num_classes=5, width_mult=0.25, inverted_residual_setting=settings, dropout=0.0)
    )


@program("torchvision_models", "torchvision")
def torchvision_fcn() -> Training:
    """Segmentation with an auxiliary head, a dict as the output, polynomial decay."""
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            aux = F.relu(self.a(x))
            return {"out": F.relu(self.b(aux)), "aux": aux}

    model = FCN(Body(), FCNHead(16, 4), FCNHead(8, 4))
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=0.9)

    def step(image: Tensor, target: Tensor) -> Tensor:
        output = model(image)
        losses = {name: F.cross_entropy(x, target, ignore_index=255) for name, x in output.items()}
        loss = losses["out"] + 0.5 * losses["aux"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    return Training(step, [(torch.rand(2, 3, 16, 16), torch.randint(4, (2, 16, 16))) for _ in range(CALLS)])
