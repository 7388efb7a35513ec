//! The log: the lockless ring, and the record buffer before it. Three records are made right, then patched.

#![no_main]

use host_analyzer::kernel::vmcoreinfo::Vmcoreinfo;
use host_analyzer::linux::printk::Log;
use libfuzzer_sys::fuzz_target;
use tinykdump_fuzz::{VIRT, World};

const RING: &[u8] = b"SYMBOL(prb)=ffff888000000000
OFFSET(printk_ringbuffer.desc_ring)=0
OFFSET(printk_ringbuffer.text_data_ring)=48
OFFSET(prb_desc_ring.count_bits)=0
OFFSET(prb_desc_ring.descs)=8
OFFSET(prb_desc_ring.infos)=16
OFFSET(prb_desc_ring.head_id)=24
OFFSET(prb_desc_ring.tail_id)=32
SIZE(prb_desc)=24
OFFSET(prb_desc.state_var)=0
OFFSET(prb_desc.text_blk_lpos)=8
OFFSET(prb_data_blk_lpos.begin)=0
OFFSET(prb_data_blk_lpos.next)=8
SIZE(printk_info)=88
OFFSET(printk_info.seq)=0
OFFSET(printk_info.ts_nsec)=8
OFFSET(printk_info.text_len)=16
OFFSET(printk_info.caller_id)=20
OFFSET(printk_info.dev_info)=24
OFFSET(dev_printk_info.subsystem)=0
LENGTH(printk_info_subsystem)=16
OFFSET(dev_printk_info.device)=16
LENGTH(printk_info_device)=48
OFFSET(prb_data_ring.size_bits)=0
OFFSET(prb_data_ring.data)=8
";

const BUFFER: &[u8] = b"SYMBOL(log_buf)=ffff888000000000
SYMBOL(log_buf_len)=ffff888000000008
SYMBOL(log_first_idx)=ffff88800000000c
SYMBOL(log_next_idx)=ffff888000000010
SIZE(printk_log)=16
OFFSET(printk_log.ts_nsec)=0
OFFSET(printk_log.len)=8
OFFSET(printk_log.text_len)=10
OFFSET(printk_log.dict_len)=12
";

fn ring(world: &mut World) {
    let words = [VIRT + 8, 2, VIRT + 0x100, VIRT + 0x200, 7, 5, 0, 8, VIRT + 0x400];
    for (index, word) in words.into_iter().enumerate() {
        world.put_u64(index as u64 * 8, word);
    }
    for id in 5..8u64 {
        let (index, begin) = (id % 4, (id - 5) * 32);
        for (word, value) in [2 << 62 | id, begin, begin + 32].into_iter().enumerate() {
            world.put_u64(0x100 + index * 24 + word as u64 * 8, value);
        }
        world.put_u64(0x200 + index * 88, id);
        world.put(0x200 + index * 88 + 16, &[5, 0, 0, 6 << 5]);
        world.put(0x400 + begin + 8, b"a\nbcd");
    }
}

fn buffer(world: &mut World) {
    world.put_u64(0, VIRT + 0x400);
    world.put(8, &[512u32, 0, 72].map(u32::to_le_bytes).concat());
    for at in [0, 24, 48] {
        world.put(0x400 + at + 8, &[24u16, 4, 3].map(u16::to_le_bytes).concat());
        world.put(0x400 + at + 16, b"texta=b");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, patches)) = bytes.split_first() else { return };
    let mut world = World::default();
    let info = match kind & 1 {
        0 => {
            ring(&mut world);
            RING
        }
        _ => {
            buffer(&mut world);
            BUFFER
        }
    };
    world.patch(0, patches);
    if let Ok(log) = Log::from_memory(&Vmcoreinfo::new(info), &world.memory()) {
        let _ = (log.is_whole(), log.panic_line(), log.reporting_cpu());
        assert!(log.records.len() < 1 << 16);
    }
});
