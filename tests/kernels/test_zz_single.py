import importlib, sys
import pytest, torch
sys.path[:0]=["/root/w/kern/tests/kernels","/root/w/kern/tests"]
from test_triton_scan import *
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", TINY)
def test_single(name, monkeypatch):
    m=importlib.import_module("seqssm.kernels.selective_scan.triton")
    monkeypatch.setattr(m,"_SINGLE_PROGRAMS",1)
    case = TINY[name]
    assert_accurate(case, run(case, inputs_in(case, torch.float32), backend="triton"), torch.float32)
