"""NDIF's model actor without a GPU; its process has no nla_lens, as a server has none.

As on NDIF, blocks of trusted users run in the actor, those of others in a process of their own.
"""

import gc
import sys

import ray
import torch
from ndif.services.ray.sandbox.host import spawn
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

# The test environment is the server's, too; importing nla_lens in a block must fail all the same.
sys.modules["nla_lens"] = None

torch.set_num_threads(1)


class CpuDeployment(SandboxModelDeployment):
    """The stock deployment but for the two methods that call torch.cuda, and fewer processes."""

    CACHEABLE = False

    def load_from_disk(self):
        self.gpu_mem_bytes_by_id = {}
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def open_pool(self, pool_size=None, peers=1):
        # Stock actors keep seven processes each warm, more than a test machine has room for.
        super().open_pool(0, peers)
        self.pool.acquire = lambda: spawn(model_key=self.model_key, timeout=120)

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
