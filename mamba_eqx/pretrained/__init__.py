from ._load import from_pretrained as from_pretrained
from ._push import push_to_hub as push_to_hub
from ._save import save_pretrained as save_pretrained
from ._state_dict import load_state_dict as load_state_dict, state_dict as state_dict
from ._stored import CheckpointError as CheckpointError
