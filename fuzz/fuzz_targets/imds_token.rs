#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kirsa::fuzz::imds_token::check(data));
