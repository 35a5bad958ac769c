"""Black-box attacks: the methods that tune weights, searching images instead."""

from gradless.attacks.base import Attack, AttackResult
from gradless.attacks.log import QueryLog
from gradless.attacks.zo_sign_sgd import ZOSignSGDAttack
from gradless.attacks.zoqo import SignHunter, ZOQOAttack

ATTACKS: dict[str, type[Attack]] = {"zoqo": ZOQOAttack, "signhunter": SignHunter, "zo_signsgd": ZOSignSGDAttack}

__all__ = ["ATTACKS", "Attack", "AttackResult", "QueryLog", "SignHunter", "ZOQOAttack", "ZOSignSGDAttack"]
