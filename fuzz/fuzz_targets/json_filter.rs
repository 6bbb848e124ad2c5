#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kirsa::fuzz::json_filter::check(data));
