// The SDK for Java, version 2.

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.URI;
import java.util.Locale;
import software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider;
import software.amazon.awssdk.http.urlconnection.UrlConnectionHttpClient;
import software.amazon.awssdk.services.sts.StsClient;

public class Client {
  public static void main(String[] arguments) throws Exception {
    tell();
    BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
    while (lines.readLine() != null) {
      tell();
    }
  }

  // A provider for each call: there is no way to have one fetch before it is time. Making it is not what is measured.
  static void tell() {
    String error = "null";
    long start;
    try (DefaultCredentialsProvider provider = DefaultCredentialsProvider.builder().build();
        StsClient sts =
            StsClient.builder()
                .credentialsProvider(provider)
                .endpointOverride(URI.create(System.getenv("STS_URL")))
                .httpClient(UrlConnectionHttpClient.create())
                .build()) {
      start = System.nanoTime();
      try {
        sts.getCallerIdentity();
      } catch (RuntimeException thrown) {
        error = '"' + thrown.toString().replaceAll("[\\\\\"\\p{Cntrl}]", " ") + '"';
      }
    }
    double seconds = (System.nanoTime() - start) / 1e9;
    System.out.println(String.format(Locale.ROOT, "{\"seconds\": %f, \"error\": %s}", seconds, error));
  }
}
