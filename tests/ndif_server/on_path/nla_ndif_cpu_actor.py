"""NDIF's model actor without a GPU; its process has no nla_lens, as a server has none.

As on NDIF, blocks of trusted users run in the actor, those of others in a process of their own.
"""

import gc
import sys

import ray
import torch
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

# The test environment is the server's, too; importing nla_lens in a block must fail all the same.
sys.modules["nla_lens"] = None

torch.set_num_threads(1)


class CpuDeployment(SandboxModelDeployment):
    """The stock deployment but for the two methods that call torch.cuda."""

    CACHEABLE = False

    def load_from_disk(self):
        self.gpu_mem_bytes_by_id = {}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self):
        self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=1, max_restarts=-1)
class CpuModelActor(CpuDeployment):
    pass
